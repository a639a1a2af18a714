"""Bodies: modules that own parameters, the sampler that draws from them, and the scorers that judge what they say."""
