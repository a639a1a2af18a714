"""The user's mistakes, apart from ours."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend; the command line prints it without a traceback and exits with status 2."""


def guarded(command: Callable[[], object]) -> int:
    """Run `command`; a `UserError` becomes one message and status 2, an interrupt becomes status 1."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1
    return 0
