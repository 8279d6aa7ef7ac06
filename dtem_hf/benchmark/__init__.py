"""Programs that time merged models beside plain ones, and write tables."""

from ..errors import need


need("evaluate", __name__)
