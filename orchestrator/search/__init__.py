"""Searches over recipes: what is asked, how trials run and end, what is kept of them, and what is shown."""
