"""Why a prompt answers as it does; ``studies/explain.py`` puts the parts together."""
