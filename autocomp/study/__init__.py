"""What one search knows, on disk: its directory, its lease, its append-only ledger. No torch."""
