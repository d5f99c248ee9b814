"""The waist: a model opened, loaded once, and drawn with many times; whatever draws uses Session and nothing below."""

from ldmcli.session.session import Session

__all__ = ["Session"]
