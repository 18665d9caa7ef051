"""Results of a run: results.json, tables, metrics and figures."""
