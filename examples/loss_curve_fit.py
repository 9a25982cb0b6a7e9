"""Where does a loss curve decelerate? Fits two straight segments in log-log space, and says how sure the break is.
Run it with: python examples/loss_curve_fit.py (some seconds on a CPU; needs scipy). On a file: zerosum fit loss.csv"""

import numpy as np
import scipy  # noqa: F401  (what the fit needs)

from zerosum import deceleration

STEPS = np.arange(1, 3001)
T_D, L_D, EARLY, LATE = 600, 3.0, 0.30, 0.08  # the break, the loss there, the slopes before and after it


def curve(late: float, noise: np.ndarray) -> np.ndarray:
    """A loss that falls as t^-EARLY up to T_D and as t^-late from there on, with noise from batch to batch."""
    t = STEPS / T_D
    return L_D * np.where(t < 1, t**-EARLY, t**-late) * np.exp(noise)


def main() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, len(STEPS))
    for name, late in (("with a break", LATE), ("without one", EARLY)):
        fit = deceleration.fit(STEPS, curve(late, noise), bootstrap=20, seed=0)
        print(f"a curve {name}: {fit.verdict}")
        if fit.found:
            for parameter, truth in (("L_d", L_D), ("t_d", T_D), ("r_d", LATE)):
                value, error = getattr(fit, parameter), fit.errors[parameter]
                print(f"  {parameter} = {value:.4g} ± {error:.2g} (made with {truth:g})")
            print("  (the fit is of a moving average, which looks back: t_d comes some 9 % late)")
            print(f"  loss at step {STEPS[-1]} by the fit {fit.L_T_hat:.4f}, on the curve {fit.L_T:.4f}")


if __name__ == "__main__":
    main()
