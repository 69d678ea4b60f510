"""Run as `python -m mst.privacy.opacus_accountant REQUEST`: Opacus's accountant, in JSON.

A process of its own, because Opacus imports torch, which planning does without.
"""

from __future__ import annotations

import json
import sys
import warnings

# Of the ε that was asked for; Opacus's own default is 0.01 of 1.
TOLERANCE = 0.005


def main(argv: list[str]) -> int:
    """Print the noise that keeps an ε, and the ε that it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, and of orders of a bound that is not used
        import opacus
        from opacus.accountants import create_accountant
        from opacus.accountants.utils import get_noise_multiplier

        asked = json.loads(argv[0])
        delta, rate, steps = asked["delta"], asked["sample_rate"], asked["steps"]
        noise = get_noise_multiplier(
            target_epsilon=asked["epsilon"],
            target_delta=delta,
            sample_rate=rate,
            steps=steps,
            accountant="prv",
            epsilon_tolerance=TOLERANCE * asked["epsilon"],
        )
        accountant = create_accountant("prv")
        accountant.history = [(noise, rate, steps)]
        found = accountant.get_epsilon(delta)
    answer = {"noise_multiplier": noise, "epsilon": found, "version": opacus.__version__}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
