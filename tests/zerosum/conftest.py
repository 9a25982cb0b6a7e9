"""Which tests of the probe run by default."""

import os

# 3,900 cases of attribution and of the loss end take 10 minutes on 2 cores. About 80 of them fail: loss ends and models that the
# probe does not read yet. They are there to be worked on: ZSL_TEST_ATTRIBUTION=1 runs them. The random models of test_fuzz always
# run.
if os.environ.get("ZSL_TEST_ATTRIBUTION") != "1":
    collect_ignore = [
        "test_attribution.py",
        "test_attribution_transformers.py",
        "test_loss_ends.py",
    ]
