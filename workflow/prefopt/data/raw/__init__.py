"""Raw records, before anybody knows their format."""
