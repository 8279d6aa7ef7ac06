"""ToMe: compare tokens by their attention keys, averaged over heads (docs/method.md section 2)."""

from __future__ import annotations

from ..configuration import ToMeConfig
from .matching import KeyMatchingMethod


class ToMe(KeyMatchingMethod):
    """Bipartite soft matching by keys, and merging by the size-weighted mean."""

    config_class = ToMeConfig
