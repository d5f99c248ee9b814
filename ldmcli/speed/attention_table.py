"""Which kernel of `models.attention` beat torch's own pick, by shape. Written by
`python -m ldmcli.bench.attention_shapes --table`; not to be edited by hand.

It is empty: no card has been measured yet, so that everywhere torch picks.
"""

# Card and libraries that were measured, by compute capability and number type.
MEASURED_WITH: dict[str, str] = {}
# Compute capability, number type, head_dim, queries, keys, batch · heads from, to, kernel.
ROWS: tuple[tuple[str, str, int, int, int, int, int, str], ...] = ()
