"""What must hold, as functions of the implementation: the tests call them on the package, the bite tests on faults."""
