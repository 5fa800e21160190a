"""Examples that are run by name: `python -m roulette_examples NAME`.

Each has a module, made-up data and a YAML file. A network with random weights is trained for some seconds, then it is
pruned.
"""
