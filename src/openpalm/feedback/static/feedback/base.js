"use strict";

// The token of the cookie, not of the page: after a sign-in in another tab only the cookie is right.
document.addEventListener("htmx:configRequest", (event) => {
  const token = document.cookie.match(/(?:^|; )openpalm_csrf=([^;]+)/);
  if (!token) return;
  event.detail.headers["x-csrftoken"] = token[1];
  delete event.detail.parameters.csrfmiddlewaretoken;
});

// A table wider than the screen scrolls; the keyboard reaches it too.
function reachTables() {
  for (const box of document.querySelectorAll(".table-scroll")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
reachTables();
window.addEventListener("resize", reachTables);
document.addEventListener("htmx:afterSwap", reachTables);
