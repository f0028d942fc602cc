"""What a run will take before it is submitted: parameters, memory, operations and hours of every stage."""
