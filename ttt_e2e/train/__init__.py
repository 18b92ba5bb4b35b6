"""The outer loop: the loop over steps, the compiled steps, optimizers, policies, batches."""
