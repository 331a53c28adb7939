"""What is not wrong but must be said: a category of warnings, so that it can be silenced or made an error by name."""

from __future__ import annotations


class AdapterNotice(UserWarning):
    """Something about an adapter file or its base that its user should know (base not verified, other precision ...)."""
