"""``python -m llada_jax.cli``."""

import sys

from llada_jax.cli.app import main

sys.exit(main())
