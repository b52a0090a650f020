"""What a run is asked to do: schemas, YAML with overrides, and what is said of mistakes."""
