"""The data plane: carries out a plan on one device. Computes, never decides."""
