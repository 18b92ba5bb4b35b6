"""The outer loop proper: the loop over steps, the compiled steps, optimizers, policies, batches."""
