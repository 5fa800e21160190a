"""The roulette wheel: which weights a candidate prunes.

`law` defines the draw and is the place to start. `level` has the wheel that a search uses, and chooses between
`threshold`, `guess` and `agreed`: three ways to draw the same weights as the law does.
"""
