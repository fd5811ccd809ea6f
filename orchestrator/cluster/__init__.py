"""What a study needs of Ray and of its nodes."""
