"""The response cache: key, plan, entry, completeness, the two forms, lookup."""
