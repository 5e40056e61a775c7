"""What a model's weights see while it reads: importance statistics, their files, their coverage."""
