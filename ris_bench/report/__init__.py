"""Tables made from result files: nothing here needs torch or Ray."""
