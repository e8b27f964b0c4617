"""Names of earlier releases and the current ones: of modules in `modules`, of everything else in `names`."""

from __future__ import annotations

from cameo.renamed.modules import MOVED, MOVED_NAMES, install, place_today
from cameo.renamed.names import (
    ATTRIBUTES,
    CONFIG_KEYS,
    FUNCTIONS,
    KEYWORDS,
    METHODS,
    SETTINGS,
    old_attributes,
    old_fields,
    old_functions,
    old_keywords,
    rename_keys,
    warn_renamed,
)

__all__ = [
    "ATTRIBUTES",
    "CONFIG_KEYS",
    "FUNCTIONS",
    "KEYWORDS",
    "METHODS",
    "MOVED",
    "MOVED_NAMES",
    "SETTINGS",
    "install",
    "old_attributes",
    "old_fields",
    "old_functions",
    "old_keywords",
    "place_today",
    "rename_keys",
    "warn_renamed",
]
