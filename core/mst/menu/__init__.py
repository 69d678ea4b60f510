"""The menu: from a model and data to a served answer, for people who don't write commands."""
