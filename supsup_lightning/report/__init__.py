"""What a run found: results.json, tables, metrics and pictures."""
