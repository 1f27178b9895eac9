"""What a run says about itself: the names of its numbers, how they become one number an update, and where they go."""
