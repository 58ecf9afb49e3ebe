"""Measurements that are no tests: a machine that is busy makes them noisy, so that ratios are taken alternately."""
