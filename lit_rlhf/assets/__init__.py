"""The small trained models that ship with the package, and the `builtin:` names that stand for their folders."""

from pathlib import Path

from lit_rlhf.errors import UserError

PREFIX = "builtin:"
MODELS = ("policy", *(f"proxy-{member}" for member in range(5)))


def resolve(name: str) -> str:
    """Return the folder behind a `builtin:` model name; any other name comes back as it is.

    Raises:
        UserError: no built-in model has this name, or this installation lacks its files.
    """
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    if short not in MODELS:
        known = ", ".join(PREFIX + model for model in MODELS)
        raise UserError(f"no built-in model is called {name!r}; expected one of {known}, a folder, or a hub id")
    folder = Path(__file__).parent / short
    if not folder.is_dir():
        raise UserError(f"{name}: its folder {folder} is missing from this installation; `make world` makes it")
    return str(folder)
