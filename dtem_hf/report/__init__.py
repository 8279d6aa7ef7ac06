"""Tables, plots, pictures and pages made from the JSON of results."""

from ..errors import need


need("plots", __name__)
