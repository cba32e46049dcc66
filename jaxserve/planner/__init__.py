"""What a model needs on devices that are not there: `jaxserve plan`. `make_plan` and `compare` are its functions."""
