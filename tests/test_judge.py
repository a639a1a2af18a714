"""A judge on loopback: what it is asked, what is believed, and that no failure costs an answer or shows the key.

The servers here are real ones, driven through the real client: `Judge` answers by a script, and breaks where told to.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from pathlib import Path
from urllib.request import urlopen

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.judge import JudgeOptions, label_aspects
from lit_rlhf.judge.answers import Answer, AnswerFile, BrokenAnswerError, parse
from lit_rlhf.judge.asking import retry_after
from lit_rlhf.judge.options import read_points
from lit_rlhf.judge.question import chances, key_of, question, verdict

pytest.importorskip("openai", reason="a judge is asked through `openai` (extra `judge`)")

ROOT = Path(__file__).parent.parent
CANARY = "sk-canary/4711\\end"
QUESTION = re.compile(
    r"in a single respect: (?P<name>.*?), that is.*=== Conversation ===\n(?P<prompt>.*)\n\n=== Reply A ===\n(?P<a>.*)"
    r"\n\n=== Reply B ===\n(?P<b>.*)\n\n=== Task ===",
    re.DOTALL,
)


def said(text, finish="stop", **more):
    """A chat completion of 100 tokens in and 10 out."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish} | more
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]} | {
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    }


def louder(asked, _number):
    """Prefer the reply with more exclamation marks, for a reason."""
    a, b = asked["a"].count("!"), asked["b"].count("!")
    return said(f"The marks decide.\nverdict: {'tie' if a == b else 'A' if a > b else 'B'}")


class Judge(ThreadingHTTPServer):
    """Answers by `script(question, number of the request)`: a completion, (status, headers, body), or a word."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.lock, self.closing = script, threading.Lock(), threading.Event()
        self.asked, self.bodies, self.headers, self.times = [], [], [], []
        self.now = self.most = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_):
        pass  # clients that were killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append(QUESTION.search(body["messages"][0]["content"]).groupdict() | {"path": self.path})
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.times.append(time.monotonic())
            server.now += 1
            server.most = max(server.most, server.now)
        reply = server.script(server.asked[number] | {"headers": self.headers, "body": body}, number)
        with server.lock:
            server.now -= 1
        self.reply(reply)

    def reply(self, reply):
        if reply == "trickle":
            self.trickle()
        if reply == "hang":
            self.server.closing.wait(20)
        if reply in ("hang", "trickle", "close"):
            self.close_connection = True
            return
        status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = int(headers.get("Content-Length", len(content))) != len(content)

    def trickle(self):
        """Answer after a second of spaces, so that every byte comes in good time and the answer does not."""
        self.send_response(200)
        self.end_headers()
        for _ in range(20):
            self.wfile.write(b" ")
            self.server.closing.wait(0.05)
        self.wfile.write(json.dumps(said("verdict: A")).encode())

    def log_message(self, *_):
        pass


@contextmanager
def judge(script=louder):
    server = Judge(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def options(server, **more):
    quick = {"backoff": 0.01, "timeout": 5.0, "concurrency": 1, "points": "loud=has more marks"}
    return JudgeOptions(url=server if isinstance(server, str) else server.url, model="tiny", **(quick | more))


def pair(i, chosen="yes!", rejected="no", **more):
    return {"prompt": f"prompt {i}", "chosen": f"{chosen} {i}", "rejected": f"{rejected} {i}"} | more


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "labelled.jsonl"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# verdicts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("verdict: A", "A"),
        ("because.\n\nVerdict: b\n\n", "B"),
        ("**Verdict:** tie.", "tie"),
        ("verdict: A\nso I say\nverdict: A", "A"),
        ("my first verdict: B\nverdict: A", "A"),
        ("verdict: A\nno, rather\nverdict: B", None),
        ("1 is better than 2. A!", None),
        ("verdict: A because it is louder", None),
        ("my verdict: A", None),
        ("verdict: A\nthat was hard", None),
        ("verdict: A or B", None),
        ("verdict: X", None),
        ("verdict:", None),
        ("A", None),
        ("", None),
    ],
)
def test_only_a_last_line_of_the_asked_form_is_a_verdict(text, expected):
    assert verdict(text) == expected


def test_an_answer_that_is_cut_has_no_verdict():
    assert Answer("verdict: A", "stop").says(swapped=False) == 1
    assert Answer("verdict: A", "stop").says(swapped=True) == -1
    assert Answer("verdict: A", "length").says(swapped=False) is None
    assert Answer("verdict: A", "content_filter").chance(swapped=False) is None


def token(text, **alternatives):
    top = [{"token": name, "logprob": log(p)} for name, p in alternatives.items()]
    return {"token": text, "logprob": log(alternatives.get(text, 0.9)), "top_logprobs": top}


def test_chances_are_read_where_the_verdict_stands():
    # an early "A" must not count; " B" and "B" both do, and so does "t", which begins "tie"; 0.6 : 0.25 : 0.05 of 0.9
    spoken = [token("A", A=0.99), token(" it is.\nverdict"), token(":")]
    last = token(" A", **{" A": 0.6, " B": 0.15, "B": 0.1, "t": 0.05, "x": 0.1})
    found = chances("A it is.\nverdict: A", [*spoken, last])
    assert found == pytest.approx({"A": 0.6 / 0.9, "B": 0.25 / 0.9, "tie": 0.05 / 0.9})
    assert chances("A it is.\nverdict: A", [token("other"), *spoken, last]) is None
    assert chances("A it is.", spoken) is None
    assert chances("verdict: A", []) is None


def test_the_question_shows_every_turn_and_its_hash_depends_on_all_of_it():
    turns = [{"role": r, "content": c} for r, c in [("system", "be {kind}"), ("user", "one"), ("assistant", "two")]]
    text = question(turns, ("first", "second"), "loud", "has marks")
    found = QUESTION.search(text)
    assert found["prompt"] == "system: be {kind}\n\nuser: one\n\nassistant: two"
    assert (found["a"], found["b"], found["name"]) == ("first", "second", "loud")
    plain = options("http://127.0.0.1:1/v1")
    requests = [plain.request(text), plain.request(text + " "), options(plain.url, soft=True).request(text)]
    assert len({key_of(request) for request in [*requests, requests[0] | {"model": "other"}, *requests]}) == 4


# labels


def test_aspects_are_kept_where_both_orders_agree(out):
    rows = [pair(0), pair(1, "no", "yes!!"), pair(2, "a!", "b!")]
    with judge() as server:
        summary = label_aspects(rows, options(server), out)
    assert lines(out) == [row | {"aspects": {"loud": value}} for row, value in zip(rows, [1, -1, 0], strict=True)]
    point = summary["points"]["loud"]
    assert point | {"pairs": 3, "kept": 2, "disagreed": 0, "tied": 1, "no_verdict": 0, "failed": 0} == point
    assert point["keep_rate"] == pytest.approx(2 / 3)
    assert (point["chosen_share"], point["first_share"]) == (0.5, 0.5)
    assert summary == json.loads((out.parent / "labelled.summary.json").read_text())
    assert [(q["a"], q["b"]) for q in server.asked[:2]] == [("yes! 0", "no 0"), ("no 0", "yes! 0")]
    assert {q["path"] for q in server.asked} == {"/v1/chat/completions"}
    assert server.bodies[0]["temperature"] == 0.0
    assert server.headers[0]["Authorization"] == "Bearer none"


def test_a_judge_that_likes_the_first_reply_keeps_nothing(out):
    with judge(lambda *_: said("verdict: A")) as server:
        point = label_aspects([pair(i) for i in range(4)], options(server), out)["points"]["loud"]
    assert (point["keep_rate"], point["disagreed"], point["first_share"]) == (0.0, 4, 1.0)
    assert [row["aspects"] for row in lines(out)] == [{"loud": 0}] * 4


def test_soft_labels_are_the_mean_of_both_orders(out):
    # chosen first: 0.8 + 0.1/2; swapped: 0.5 + 0.2/2 for B; mean (0.85 + 0.6) / 2
    def script(asked, _):
        shares = {" A": 0.8, " B": 0.1, " tie": 0.1} if "yes" in asked["a"] else {" A": 0.3, " B": 0.5, " tie": 0.2}
        spoken = max(shares, key=shares.get)
        return said(f"verdict:{spoken}", logprobs={"content": [token("verdict:"), token(spoken, **shares)]})

    with judge(script) as server:
        summary = label_aspects([pair(0)], options(server, soft=True), out)
    assert server.bodies[0]["logprobs"] is True
    assert lines(out)[0]["aspects"] == {"loud": 1}
    assert lines(out)[0]["aspects_soft"] == {"loud": pytest.approx(0.725)}
    assert summary["answers_with_probabilities"] == 2


@pytest.mark.parametrize("refused", [False, True])
def test_soft_labels_of_a_server_without_log_probabilities_are_its_verdicts(out, refused):
    def script(asked, number):
        if refused and "logprobs" in asked["body"]:
            return 422, {}, {"detail": "Unexpected fields in the request: {'logprobs', 'top_logprobs'}"}
        return said("verdict: A") if "yes" in asked["a"] or "1" in asked["prompt"] else louder(asked, number)

    with judge(script) as server:
        summary = label_aspects([pair(0), pair(1)], options(server, soft=True, concurrency=4), out)
    assert [row["aspects_soft"]["loud"] for row in lines(out)] == [1.0, 0.5]
    assert summary["answers_with_probabilities"] == 0
    assert summary["this_run"]["failed"] == 0


def test_points_by_category_and_all_other_fields_stay(out):
    points = out.parent / "points.yaml"
    points.write_text("chat:\n  loud: has more marks\n  long: has more words\nqa:\n  loud: has more marks\n")
    rows = [
        pair(0, category="chat", aspects={"loud": -1, "warm": 1}, margin=0.5, flipped=True),
        pair(1, category="qa"),
        pair(2, category="other", aspects={"loud": 1}),
    ]
    with judge() as server:
        summary = label_aspects(rows, options(server, points=str(points)), out)
    assert [row.pop("aspects") for row in lines(out)] == [{"warm": 1, "loud": 1, "long": 1}, {"loud": 1}, {"loud": 1}]
    assert lines(out)[0] | {"aspects": 0} == rows[0] | {"aspects": 0}
    assert lines(out)[2] == rows[2]
    assert set(summary["points"]) == {"chat/loud", "chat/long", "qa/loud"}
    assert summary["pairs_without_points"] == 1
    assert len(server.asked) == 6


def test_equal_pairs_are_asked_once(out):
    with judge() as server:
        label_aspects([pair(0)] * 5, options(server, concurrency=4), out)
    assert len(server.asked) == 2
    assert [row["aspects"] for row in lines(out)] == [{"loud": 1}] * 5


def test_no_more_requests_at_once_than_allowed(out):
    def script(asked, number):
        time.sleep(0.02)
        return louder(asked, number)

    with judge(script) as server:
        label_aspects([pair(i) for i in range(10)], options(server, concurrency=3), out)
    assert server.most == 3


# answers on disk


def test_nothing_is_asked_twice(out):
    with judge() as server:
        label_aspects([pair(i) for i in range(3)], options(server), out)
        first = out.read_text()
        again = label_aspects([pair(i) for i in range(3)], options(server), out)
        assert len(server.asked) == 6
        assert out.read_text() == first
        assert again["this_run"]["answered"] == 0
        assert again["questions_answered_before"] == 6
        label_aspects([pair(i) for i in range(4)], options(server), out)
        assert len(server.asked) == 8
        label_aspects([pair(0)], options(server, points="loud=has other marks"), out)
        assert len(server.asked) == 10


def test_a_killed_run_goes_on_where_it_was(out):
    """SIGKILL at the seventh of twelve questions: the six answers before it are never asked for again."""
    rows = [pair(i) for i in range(6)]
    stuck = threading.Event()

    def script(asked, number):
        if number == 6:
            stuck.set()
            return "hang"
        return louder(asked, number)

    code = "import json, sys\nfrom lit_rlhf.judge import JudgeOptions, label_aspects\n"
    code += "label_aspects(json.loads(sys.argv[1]), JudgeOptions(**json.loads(sys.argv[2])), sys.argv[3])"
    with judge(script) as server:
        asked = {"url": server.url, "model": "tiny", "points": "loud=has more marks", "concurrency": 1}
        arguments = [sys.executable, "-c", code, json.dumps(rows), json.dumps(asked), str(out)]
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            assert stuck.wait(60)
            process.kill()
        assert not out.exists()
        answers = out.with_name("labelled.answers.jsonl")
        assert len(lines(answers)) == 6
        answers.write_bytes(answers.read_bytes()[:-20])  # as if the sixth line had been torn by the kill
        summary = label_aspects(rows, options(server), out)
    counts = Counter((q["prompt"], q["a"]) for q in server.asked)
    assert sorted(counts.values()) == [1] * 10 + [2] * 2  # twice: the torn one, and the one without an answer
    assert summary["questions_answered_before"] == 5
    assert [row["aspects"] for row in lines(out)] == [{"loud": 1}] * 6


def test_a_file_of_something_else_is_refused(out):
    cache = out.with_name("labelled.answers.jsonl")
    cache.write_text('{"prompt": "p"}\n')
    with judge() as server, pytest.raises(UserError, match=r"answers\.jsonl: holds .*expected the answers of a judge"):
        label_aspects([pair(0)], options(server), out)
    assert server.asked == []


def test_the_file_keeps_an_answer_as_it_was(tmp_path):
    answer = Answer("Ünïcode \ud83d\nverdict: A", "stop", 3, None, {"A": 0.5, "B": 0.25, "tie": 0.25})
    with AnswerFile(tmp_path / "a.jsonl") as answers:
        answers.add("k", answer)
    with AnswerFile(tmp_path / "a.jsonl") as answers:
        assert answers.get("k") == answer


# failures

FAILURES = {
    "429": (429, {"Retry-After": "0.3"}, {"error": {"message": "slow down"}}),
    "500": (500, {}, "<html>oops</html>"),
    "503": (503, {"Retry-After": "soon"}, {}),
    "hang": "hang",
    "a byte now and then": "trickle",
    "connection closed": "close",
    "half an answer": (200, {"Content-Length": "4000"}, json.dumps(said("verdict: A"))),
    "half JSON": (200, {}, json.dumps(said("verdict: A"))[:60]),
    "garbage": (200, {"Content-Type": "text/html"}, "<html>verdict: A</html>"),
    "another JSON": (200, {}, ["verdict: A"]),
    "no choices": (200, {}, {"choices": []}),
    "a list as text": (200, {}, said([{"type": "text", "text": "verdict: A"}])),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_that_pass_are_tried_again(name, out):
    with judge(lambda asked, number: FAILURES[name] if number in (0, 3) else louder(asked, number)) as server:
        summary = label_aspects(
            [pair(0), pair(1)], options(server, timeout=0.3 if FAILURES[name] in ("hang", "trickle") else 5.0), out
        )
    assert [row["aspects"] for row in lines(out)] == [{"loud": 1}] * 2
    assert len(server.asked) == 6
    assert summary["this_run"]["retries"] == 2
    assert summary["this_run"]["failed"] == 0
    assert summary["this_run"]["answered"] == 4


def test_all_wait_when_the_server_asks_for_peace(out):
    wait = FAILURES["429"]

    def script(asked, number):
        time.sleep(0.02 * number)  # the first one is refused before the others are through
        return wait if number == 0 else louder(asked, number)

    with judge(script) as server:
        label_aspects([pair(i) for i in range(3)], options(server, concurrency=2), out)
    assert server.times[2] - server.times[0] > 0.3
    assert server.times[1] - server.times[0] < 0.3


def test_retry_after_in_seconds_and_as_a_date():
    assert retry_after("2") == 2
    assert retry_after("0.5") == 0.5
    assert retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)) == pytest.approx(
        30, abs=2
    )
    assert [retry_after(value) for value in (None, "", "soon", "-3", "inf", "nan", "Tue")] == [0.0] * 7


def test_further_tries_wait_longer_and_longer(out):
    with judge(lambda asked, number: FAILURES["500"] if number < 4 else louder(asked, number)) as server:
        label_aspects([pair(0)], options(server, backoff=0.04), out)
    waits = [b - a for a, b in zip(server.times[:5], server.times[1:5], strict=False)]
    for wait, longest in zip(waits, (0.04, 0.08, 0.16, 0.32), strict=True):
        assert longest / 2 <= wait < longest + 0.1  # half to all of it, and the request itself


def test_questions_without_an_answer_are_counted_and_asked_anew(out):
    def script(asked, number):
        if asked["prompt"] == "prompt 1":
            return (400, {}, {"error": {"message": "too long"}}) if "yes" in asked["a"] else FAILURES["500"]
        return louder(asked, number)

    rows = [pair(0), pair(1, aspects={"warm": 1}), pair(2)]
    with judge(script) as server:
        summary = label_aspects(rows, options(server, max_retries=2), out)
        assert Counter(q["prompt"] for q in server.asked) == {"prompt 0": 2, "prompt 1": 1 + 3, "prompt 2": 2}
        assert [row["aspects"] for row in lines(out)] == [{"loud": 1}, {"warm": 1}, {"loud": 1}]
        assert summary["this_run"]["failed"] == 2
        assert summary["pairs_without_labels"] == 1
        assert summary["points"]["loud"]["failed"] == 1
        server.script = louder
        label_aspects(rows, options(server), out)
        assert len(server.asked) == 10
    assert [row["aspects"] for row in lines(out)] == [{"loud": 1}, {"warm": 1, "loud": 1}, {"loud": 1}]


def test_an_answer_without_verdict_is_kept_apart_and_not_asked_again(out):
    def script(asked, number):
        if asked["prompt"] == "prompt 0":
            return said("verdict: A", finish="length")  # an old label of this name must not stay in its place
        if asked["prompt"] == "prompt 1":
            return said(None, message={"role": "assistant", "content": None, "refusal": "I will not"})
        return said("I like A") if asked["prompt"] == "prompt 2" else louder(asked, number)

    with judge(script) as server:
        rows = [pair(0, aspects={"loud": 1}), *(pair(i) for i in range(1, 4))]
        label_aspects(rows, options(server), out)
        summary = label_aspects(rows, options(server), out)
        assert len(server.asked) == 8
    assert ["aspects" in row for row in lines(out)] == [False, False, False, True]
    assert summary["points"]["loud"]["no_verdict"] == 3
    assert summary["points"]["loud"]["keep_rate"] == 0.25


def test_too_many_failures_stop_and_keep_what_was_answered(out):
    out.write_text("the old labels\n")
    with judge(lambda asked, number: FAILURES["500"] if number >= 3 else louder(asked, number)) as server:
        with pytest.raises(UserError, match=r"3 questions in a row .* 500: <html>oops</html>.*goes on from there"):
            label_aspects([pair(i) for i in range(20)], options(server, max_retries=1, max_failures=3), out)
        assert len(server.asked) == 3 + 3 * 2
    assert len(lines(out.with_name("labelled.answers.jsonl"))) == 3
    assert out.read_text() == "the old labels\n"


def test_refused_questions_alone_stop_no_run_that_goes_on(out):
    refusal = (400, {}, {"error": {"message": "too long"}})
    rows = [pair(i) for i in range(8)]
    with judge(lambda asked, number: louder(asked, number) if asked["prompt"] < "prompt 2" else refusal) as server:
        for _ in range(2):  # the second run asks the refused ones alone
            summary = label_aspects(rows, options(server, max_failures=3, concurrency=1), out)
            assert summary["this_run"]["failed"] == 12
    assert [("aspects" in row) for row in lines(out)] == [True] * 2 + [False] * 6


def test_a_server_that_refuses_everything_stops_the_run(out):
    with judge(lambda asked, number: (400, {}, {"error": {"message": "no such field"}})) as server:
        with pytest.raises(UserError, match=r"3 questions in a row .* 400.*no such field"):
            label_aspects([pair(i) for i in range(20)], options(server, max_failures=3, concurrency=1), out)
        assert len(server.asked) == 3


def test_failures_between_answers_do_not_stop(out):
    with judge(lambda asked, number: FAILURES["500"] if number % 3 else louder(asked, number)) as server:
        summary = label_aspects([pair(i) for i in range(6)], options(server, max_retries=0, max_failures=3), out)
    assert summary["this_run"]["failed"] == 8


HOPELESS = {
    "401": ((401, {}, {"error": {"message": "bad key"}}), "401.*bad key.*a key in the environment.*OPENAI_API_KEY"),
    "404": ((404, {}, {"detail": "Not Found"}), "404.*Not Found.*judge.url.*'tiny'"),
    "no model": ((400, {}, {"error": {"message": "no tiny", "code": "model_not_found"}}), "400.*no tiny.*'tiny'"),
    "no credit": ((429, {}, {"error": {"message": "pay", "code": "insufficient_quota"}}), "429.*pay"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_errors_that_stay_stop_at_once(name, out):
    reply, expected = HOPELESS[name]
    with judge(lambda asked, number: reply if number == 1 else louder(asked, number)) as server:
        with pytest.raises(UserError, match=expected):
            label_aspects([pair(i) for i in range(9)], options(server), out)
        assert len(server.asked) == 2
    assert len(lines(out.with_name("labelled.answers.jsonl"))) == 1
    assert not out.exists()


def test_nobody_at_the_address_is_said_at_once(out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=f"nobody answers at {url}"):
            label_aspects([pair(0)], options(url), out)


def test_a_broken_body_is_no_answer():
    for body in (
        None,
        3,
        "text",
        {},
        {"choices": [{"message": "text"}]},
        said(3),
        said("x", logprobs={"content": [1]}),
    ):
        if body == said("x", logprobs={"content": [1]}):
            body["choices"][0]["message"]["content"] = "verdict: A"
        with pytest.raises(BrokenAnswerError):
            parse(body)


# the key


def test_the_key_is_sent_and_shown_nowhere(out, monkeypatch, capfd):
    """The server repeats the key in an answer, in an error that passes, one that is refused, and one that stays."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY + "\n")

    def script(asked, number):
        key = asked["headers"]["Authorization"]
        assert key == f"Bearer {CANARY}"
        if number in (1, 2, 4):
            return {1: 500, 2: 400, 4: 401}[number], {}, {"error": {"message": "x" * 260 + key}}
        return said(f"your key is {key}\nverdict: A", finish=key)

    with judge(script) as server:
        with pytest.raises(UserError) as caught:
            label_aspects([pair(i) for i in range(3)], options(server, max_tokens=0), out)
        assert len(server.asked) == 5
        server.script = lambda asked, number: said(f"{asked['headers']['Authorization']}\nverdict: tie")
        summary = label_aspects([pair(i) for i in range(3)], options(server, max_tokens=0), out)
    seen = str(caught.value) + str(summary) + "".join(capfd.readouterr())
    seen += "".join(path.read_text() for path in out.parent.rglob("*") if path.is_file())
    assert "[key]" in seen
    assert all(piece not in seen for piece in ("canary", "4711", "sk-"))


@pytest.mark.parametrize("place", [f"http://user:{CANARY}@host/v1", f"http://host/v1?key={CANARY}", f"{CANARY}://host"])
def test_a_key_in_the_address_is_refused_and_not_repeated(place):
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        options(place)
    assert "canary" not in str(caught.value)


# options and the command


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"concurrency": 0}, "judge.concurrency must be >= 1, got 0"),
        ({"timeout": 0.0}, "judge.timeout must be > 0 seconds"),
        ({"max_retries": -1}, "judge.max_retries must be >= 0"),
        ({"points": ""}, "missing: judge.points"),
        ({"price_in": float("nan")}, "judge.price_in must be >= 0, got nan"),
    ],
)
def test_options_out_of_range_are_named(changes, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        options("http://127.0.0.1:1/v1", **changes)


def test_points_from_text_and_files(tmp_path):
    assert read_points("warm=kind: very = much ; clear = easy") == {
        None: {"warm": "kind: very = much", "clear": "easy"}
    }
    (tmp_path / "flat.json").write_text('{"warm": "is kind"}')
    assert read_points(str(tmp_path / "flat.json")) == {None: {"warm": "is kind"}}
    for name, text in {
        "a.yaml": "- warm",
        "b.yaml": "warm: [1]",
        "c.json": "{",
        "d.yaml": "chat: {}",
        "e.yml": "",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=re.escape(name)):
            read_points(str(tmp_path / name))
    for text in ("nowhere.yaml", "warm", "=kind", "warm=", ";"):
        with pytest.raises(UserError, match=re.escape(text.partition("=")[0] or "judge.points")):
            read_points(text)


def test_categories_without_points_are_named(out):
    points = out.parent / "points.json"
    points.write_text('{"chat": {"loud": "has marks"}}')
    with pytest.raises(UserError, match=r"points for the categories chat; the rows have None, qa"):
        label_aspects([pair(0), pair(1, category="qa")], options("http://127.0.0.1:1/v1", points=str(points)), out)


def test_label_by_a_judge_from_the_command_line(out, capfd):
    from lit_rlhf.front import main

    source = out.parent / "pairs.jsonl"
    messages = {"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes!"}]}
    messages |= {"rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]}
    rows = [pair(0, extra={"kept": [1]}), messages, pair(2)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with judge() as server:
        arguments = ["label", str(out), "--source", str(source), "--n", "2", "--judge.url", server.url]
        arguments += ["--judge.model", "tiny", "--judge.points", "loud=has: more marks", "--judge.price_in", "2.5"]
        arguments += ["--judge.price_out", "10"]
        assert main(arguments) == 0
        first, second = lines(out)
        assert main([*arguments, "--noise", "0.1"]) == 2
        server.script = lambda *_: HOPELESS["401"][0]
        assert main([*arguments, "--judge.temperature", "null"]) == 2
    assert first == rows[0] | {"aspects": {"loud": 1}}
    assert second["prompt"] == [{"role": "user", "content": "hi"}]
    assert (second["chosen"], second["rejected"], second["aspects"]) == ("yes!", "no", {"loud": 1})
    shown = capfd.readouterr()
    assert "more than 2 pairs" in shown.out
    assert re.search(r"loud +2 +100\.0% +0 +0 +0 +0 +50\.0%", shown.out)
    assert "4 of 4 questions asked, 400 tokens in, 40 out, cost 0.0014" in shown.err  # 400 x 2.5 and 40 x 10, a million
    assert "noise, aspect_noise and gold belong to gold labels" in shown.err
    assert "401" in shown.err
    assert "Traceback" not in shown.err


# a server that others wrote


@pytest.mark.slow
def test_transformers_serve_answers_in_the_same_protocol(out):
    """The tiny world model has no idea of verdicts: every answer is counted, none is believed."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("`transformers serve` needs fastapi and uvicorn; pip install 'transformers[serving]'")
    import shutil

    from lit_rlhf.assets import resolve

    folder = out.parent / "tiny"
    shutil.copytree(resolve("builtin:policy"), folder)
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn['content'] }} {% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--port", str(port), "--device", "cpu"]
    log_file = out.parent / "serve.log"
    with log_file.open("w") as log_, subprocess.Popen(command, stdout=log_, stderr=log_, env=os.environ) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log_file)
            asked = JudgeOptions(
                url=f"http://127.0.0.1:{port}/v1", model=str(folder), points="warm=is kind", max_tokens=8, concurrency=2
            )
            summary = label_aspects([pair(i) for i in range(3)], asked, out)
        finally:
            process.terminate()
    assert summary["this_run"]["answered"] == 6, log_file.read_text()
    assert summary["this_run"]["failed"] == 0
    assert summary["this_run"]["tokens_in"] > 600
    assert 6 <= summary["this_run"]["tokens_out"] <= 48
    assert summary["points"]["warm"]["no_verdict"] == 3
    assert lines(out) == [pair(i) for i in range(3)]


def wait_for(url, process, log_file):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, log_file.read_text()
        try:
            with urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log_file.read_text())
