"""Studies: many runs that differ in one thing, what they came to, and a report of them."""
