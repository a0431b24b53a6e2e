"""One script per claim of the README; each writes rows to results/NAME.jsonl, and tables.py reads them."""
