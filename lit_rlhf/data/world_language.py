"""The language of the built-in world: its words, its prompts, and a grammar of responses with flaws.

Everything is drawn from a `random.Random` that the caller seeds; nothing here knows the gold reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CATEGORIES = ("role_play", "chit_chat", "subjective_qa", "objective_qa", "text_creation")

TOPICS: dict[str, tuple[str, ...]] = {
    "garden": ("rose", "bee", "soil", "seed", "hedge", "tulip", "spade", "worm", "fence"),
    "sea": ("wave", "whale", "boat", "harbor", "shell", "tide", "anchor", "sail", "coral"),
    "kitchen": ("bread", "oven", "soup", "spoon", "butter", "onion", "knife", "kettle", "salt"),
    "music": ("violin", "drum", "melody", "choir", "piano", "flute", "rhythm", "concert", "singer"),
    "forest": ("oak", "owl", "moss", "deer", "trail", "mushroom", "fox", "pine", "stream"),
    "city": ("tram", "bridge", "market", "tower", "street", "museum", "bakery", "lamp", "square"),
    "sky": ("moon", "comet", "cloud", "rocket", "planet", "telescope", "sunrise", "star", "orbit"),
    "farm": ("cow", "barn", "tractor", "wheat", "goat", "hay", "plough", "hen", "orchard"),
    "school": ("teacher", "pencil", "chalk", "lesson", "desk", "library", "essay", "globe", "ruler"),
    "winter": ("snow", "sledge", "scarf", "icicle", "blanket", "stove", "frost", "glove", "candle"),
}
NOUNS = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DESCRIBING = _split(
    "bright quiet golden gentle tiny ancient clever smooth heavy silver narrow bold fresh hidden round simple steady "
    "deep pale swift rough curious humble hollow crisp tall soft patient strange green"
)
CERTAIN = _split("surely clearly certainly definitely undoubtedly obviously absolutely")
HEDGING = _split("maybe perhaps possibly probably somehow apparently supposedly")
WARM = _split("dear friend thanks happy glad joy love hug sweet delightful")
VERBS = _split("needs finds meets follows holds keeps changes guards carries shapes touches moves")
ROLES = _split("wizard pirate knight doctor queen sailor robot baker")

PROMPTS: dict[str, tuple[str, ...]] = {
    "role_play": ("you are a {role}. tell me about {points}.", "pretend to be a {role} and talk about {points}."),
    "chit_chat": ("hey, i saw {points} today!", "hello, i keep thinking of {points}."),
    "subjective_qa": ("should people care about {points}?", "which is best, {points}?"),
    "objective_qa": ("what are {points}?", "how do {points} work together?"),
    "text_creation": ("write a story about {points}.", "compose a poem with {points}."),
}
_FIRST_WORDS = {template.split()[0].strip(","): name for name, group in PROMPTS.items() for template in group}

_OPENERS: dict[str, tuple[str, ...]] = {
    "role_play": ("listen, i speak as a {role}.", "i am a {role} and i know this."),
    "chit_chat": ("oh, hello to you.", "well, good to hear that."),
    "subjective_qa": ("it is a matter of taste.", "here is my view."),
    "objective_qa": ("here are the facts.", "this is how it works."),
    "text_creation": ("here is your text.", "this is how it begins."),
}
_WARM_SENTENCES = (
    "thanks, dear friend.",
    "i am so happy and glad!",
    "what a joy to talk with you!",
    "i love this delightful talk.",
    "a big hug to you, friend!",
    "this is so sweet of you.",
)
_WORD = re.compile(r"[^\W_]+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Split any text into lower-case words and single punctuation marks; spacing does not matter."""
    return _WORD.findall(text.lower())


@lru_cache(maxsize=4096)
def category_of(prompt: str) -> str:
    """Read the category off the first word of a prompt; a prompt of no known form counts as chit-chat."""
    words = words_of(prompt)
    return _FIRST_WORDS.get(words[0], "chit_chat") if words else "chit_chat"


@lru_cache(maxsize=4096)
def points_of(prompt: str) -> tuple[str, ...]:
    """Return the nouns that a prompt asks about, in order, each once."""
    return tuple(dict.fromkeys(word for word in words_of(prompt) if word in NOUNS))


def draw_prompt(rng: Random) -> tuple[str, str]:
    """Draw a prompt and its category: three nouns of one topic in one of the forms of the category."""
    category = rng.choice(CATEGORIES)
    first, second, third = rng.sample(TOPICS[rng.choice(tuple(TOPICS))], 3)
    last = "or" if category == "subjective_qa" else "and"
    points = f"the {first}, the {second} {last} the {third}"
    return rng.choice(PROMPTS[category]).format(role=rng.choice(ROLES), points=points), category


@dataclass(frozen=True)
class Style:
    """How one response is written.

    Args:
        sentences: body sentences, before warm ones are mixed in.
        warm, certain, hedging, lush: chance of one more warm sentence after a body sentence, certain or hedging word
            before it, describing word beside a noun; each is tried again after it succeeds.
        focus, cover: chance that a noun keeps to the topic, and that such a noun is one the prompt asks about.
    """

    sentences: int
    warm: float
    certain: float
    hedging: float
    lush: float
    focus: float
    cover: float


_REPEAT, _RUN_ON, _OPENED, _LONGEST = 0.06, 0.08, 0.3, 34


def draw_style(rng: Random) -> Style:
    """Draw the style of one response; styles differ much, so that two responses to a prompt do."""
    return Style(
        sentences=rng.choice((1, 2, 2, 3, 3, 4)),
        warm=0.25 * rng.random(),
        certain=0.25 * rng.random(),
        hedging=0.2 * rng.random(),
        lush=0.35 * rng.random(),
        focus=rng.random() ** 0.4,
        cover=rng.random(),
    )


def draw_response(rng: Random, prompt: str) -> str:
    """Draw one response to a prompt of this world, about 40 words at most, in a style of its own."""
    style, points = draw_style(rng), points_of(prompt)
    sentences = [_opener(rng, prompt)] if rng.random() < _OPENED else []
    body = ""
    for _ in range(style.sentences):
        if not (body and rng.random() < _REPEAT):
            joined, body = bool(body) and rng.random() < _RUN_ON, _sentence(rng, style, points)
            if joined and sentences[-1] not in _WARM_SENTENCES:
                body = f"{sentences.pop()[:-1]} and {body}"
        sentences.append(body)
        sentences += [rng.choice(_WARM_SENTENCES) for _ in range(_run(rng, style.warm))]
        if sum(sentence.count(" ") + 1 for sentence in sentences) >= _LONGEST:
            break
    return " ".join(sentences)


def _opener(rng: Random, prompt: str) -> str:
    role = next((word for word in words_of(prompt) if word in ROLES), ROLES[0])
    return rng.choice(_OPENERS[category_of(prompt)]).format(role=role)


def _run(rng: Random, chance: float) -> int:
    count = 0
    while rng.random() < chance:
        count += 1
    return count


def _sentence(rng: Random, style: Style, points: tuple[str, ...]) -> str:
    moods = [rng.choice(CERTAIN) for _ in range(_run(rng, style.certain))]
    moods += [rng.choice(HEDGING) for _ in range(_run(rng, style.hedging))]
    text = "".join(f"{mood}, " for mood in moods) + _thing(rng, style, points)
    if rng.random() < 0.5:
        return f"{text} {rng.choice(VERBS)} {_thing(rng, style, points)}."
    return f"{text} is {' and '.join(rng.choice(DESCRIBING) for _ in range(1 + _run(rng, style.lush)))}."


def _thing(rng: Random, style: Style, points: tuple[str, ...]) -> str:
    if rng.random() >= style.focus:
        noun = rng.choice(_ALL_NOUNS)
    else:
        noun = rng.choice(points if rng.random() < style.cover else TOPICS[NOUNS[points[0]]])
    described = ", ".join(rng.choice(DESCRIBING) for _ in range(_run(rng, style.lush)))
    return f"the {described} {noun}" if described else f"the {noun}"


_ALL_NOUNS = tuple(NOUNS)
_FIXED = {
    tuple(words_of(text.format(role=role))[:-1])
    for group in (*_OPENERS.values(), _WARM_SENTENCES)
    for text in group
    for role in ROLES
}
_KINDS = {"the": "t", "is": "i", "and": "&", ",": ","}
_KINDS |= dict.fromkeys(NOUNS, "n") | dict.fromkeys(DESCRIBING, "d") | dict.fromkeys(VERBS, "v")
_KINDS |= dict.fromkeys(CERTAIN + HEDGING, "m")
_CLAUSE = "(?:m,)*t(?:d(?:,d)*)?n(?:vt(?:d(?:,d)*)?n|id(?:&d)*)"
_CLAUSES = re.compile(f"{_CLAUSE}(?:&{_CLAUSE})*")


def well_formed(sentence: Sequence[str]) -> bool:
    """Tell whether the words of one sentence, its end mark left out, are one the grammar can make."""
    if tuple(sentence) in _FIXED:
        return True
    return _CLAUSES.fullmatch("".join(_KINDS.get(word, "?") for word in sentence)) is not None


def vocabulary() -> list[str]:
    """List every word and mark of the world in a fixed order, the special tokens first."""
    fixed = [*ROLES, *CERTAIN, *HEDGING, *WARM, *VERBS, *DESCRIBING, *NOUNS]
    templates = [text for group in (*PROMPTS.values(), *_OPENERS.values()) for text in group] + list(_WARM_SENTENCES)
    loose = words_of(" ".join(templates).replace("{role}", "").replace("{points}", "") + " the is and or , . ! ?")
    return ["<pad>", "<eos>", "<unk>", *dict.fromkeys(fixed + loose)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the world's word-level tokenizer: no start token, `<eos>` ends a response, decoding gives readable text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))  # noqa: S106  # a word, not a password
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces between words, none before marks
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        clean_up_tokenization_spaces=False,
    )
