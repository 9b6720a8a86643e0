"""Files, locks, places and the hub: whatever is written is whole or not there."""
