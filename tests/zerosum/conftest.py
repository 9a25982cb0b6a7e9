"""Which tests of the probe run by default."""

import os

# 4,350 cases of attribution and of the loss end take 10 to 15 minutes on 2 cores. About 100 of them fail: loss ends and models that
# the probe does not read yet. They are there to be worked on: ZSL_TEST_ATTRIBUTION=1 runs them. The random models of test_fuzz
# always run. test_elsewhere: naming rows reads from the device in the first pass, which its counts do not allow yet.
if os.environ.get("ZSL_TEST_ATTRIBUTION") != "1":
    collect_ignore = [
        "test_elsewhere.py",
        "test_attribution.py",
        "test_attribution_transformers.py",
        "test_loss_ends.py",
        "test_plain_step.py",
    ]
