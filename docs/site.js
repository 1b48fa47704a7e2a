// In the search a leading - means "without this word": dashes go, so that `--resume` finds it.
const search = document.querySelector("[data-md-component=search-query]");
for (const name of ["focus", "keyup"])
  document.addEventListener(name, ({ target }) => {
    if (target === search) search.value = search.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  }, true);  // before the theme reads it
search?.dispatchEvent(new Event("keyup", { bubbles: true }));  // words of the address: ?q=--resume
