"""Speeds, as ratios measured side by side in one run, beside what the hardware could do."""
