"""Tables, plots, pictures and pages made from the JSON of results."""
