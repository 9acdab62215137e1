"""What a run takes, before it runs: for --dry_run, and for the refusal of what cannot fit a GPU."""
