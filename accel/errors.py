"""The one error that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: shown as two lines (what, and what to do), exit status 2, no traceback.

    >>> raise UserError("no such file: cat.mp4", hint="check the path; `livestyle run demo` needs no file")
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
