"""What a person sees of a study: live view, tables, web page, MLflow. Owns no data."""
