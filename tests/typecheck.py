"""The checker that stands behind every signature while tests run."""

from beartype import BeartypeConf, beartype

# An int is a float where a float is asked for, as type checkers have it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
