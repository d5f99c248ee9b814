"""The waist: a model opened, loaded once, and drawn with many times; whatever draws uses Session and nothing below."""

from ldmcli.session.picture import Picture
from ldmcli.session.session import CancelledError, Progress, Session

__all__ = ["CancelledError", "Picture", "Progress", "Session"]
