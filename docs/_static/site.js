// What the theme leaves out for readers without a mouse or a screen.
document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll(".caption[role=heading]")) {
    caption.setAttribute("aria-level", "2");
  }
  const scrolling = "pre, .table-wrapper, .formula";
  for (const part of document.querySelectorAll(scrolling)) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;  // arrow keys scroll it
  }
});
