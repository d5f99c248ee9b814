"""Where sampling steps may sit, by name."""

TRAINED = ("leading", "trailing", "linspace")  # on training steps (Lin et al. 2023, table 2)
RESPACED = ("karras", "exponential", "beta", "normal", "sgm_uniform", "simple", "ays")  # levels that need no such step
SPACINGS = (*TRAINED, *RESPACED)
