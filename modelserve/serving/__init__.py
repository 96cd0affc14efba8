"""One model in service: reconciled with the registry, loaded, proven, replaced, freed."""
