"""mSAM in Lightning; it lives in `msam.integrations.lightning`."""

from msam.integrations.lightning import MSAMMixin

__all__ = ["MSAMMixin"]
