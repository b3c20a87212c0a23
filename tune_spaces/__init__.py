"""What is worth searching: a file a method or pipeline, ranges in Ray Tune's own objects, each with its reason."""
